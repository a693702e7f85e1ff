"""What attackers want of a classifier's answers; each goal owns its losses."""
