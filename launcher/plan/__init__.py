"""Pure arithmetic on the config: layout, parameters, token horizon, exposure. No torch; preflight alone reads the disk."""
