"""The clients and their futures. Thin: they check, convert and queue; the engine works."""
