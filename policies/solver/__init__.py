"""What `auto`, `optimal`, `calls` and `rotor` solve with: choices, programs, bounds."""
