"""Both arms side by side: many runs, what they say about each other, and the page that shows it."""
