"""What is drawn and written for people: pages, figures, tables."""
