"""Tasks whose truth is known by construction: samples made as they are asked for, with the places of their answers."""
