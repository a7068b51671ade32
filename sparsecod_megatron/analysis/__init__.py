"""What runs and trained models show about the use of their depth: reading runs, plots and the report page."""
