"""Model output → typed events: reasoning, content and tool calls. Pure: text in, events out."""
