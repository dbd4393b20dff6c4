"""The processes of a launch: who each is, how they meet, talk, stop and fail."""
