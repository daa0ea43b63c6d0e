"""Images, audio, video and files in a chat."""
