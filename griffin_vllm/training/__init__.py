"""The offline trainer: GRIFFIN, HASS and EAGLE heads. Imports no vLLM."""
