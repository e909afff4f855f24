"""Measurements: what a format costs in quality (`evaluate`), how fast it writes (`generate`).

`contenders` says what is compared and how each is loaded, `measure` holds the clock and the byte counts,
`environment` what every row must say of the machine it came from.
"""
