"""Arrays and text that the stages share."""
