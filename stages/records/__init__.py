"""Hold what flows between the rooms: sites, number formats, results."""
