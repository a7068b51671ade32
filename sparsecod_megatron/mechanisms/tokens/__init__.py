"""Mechanisms that look tokens up: tables whose rows are chosen by token ids, not by hidden states."""
