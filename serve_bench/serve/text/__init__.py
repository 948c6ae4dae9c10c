"""What is read out of the text of an answer: stop strings and tool calls."""
