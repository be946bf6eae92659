"""Define the frozen records that flow between the rooms: sites, number formats, results."""
