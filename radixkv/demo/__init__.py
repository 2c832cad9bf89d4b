"""L6: the demo: a real model serves chats through all tiers, and everything it reads is checked."""
