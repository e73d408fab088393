"""What we claim, as programs that print it. Each writes results/NAME.json with machine, commit and command."""
