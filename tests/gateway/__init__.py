"""The gateway, with the official clients of the APIs that it speaks."""
