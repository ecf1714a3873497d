"""The Anthropic API: /v1/messages, in its own shapes, over the same chats."""
