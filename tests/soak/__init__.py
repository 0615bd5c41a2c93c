"""The conservation soak: what clients counted themselves is what the maps hold, however often meshd was upgraded."""
