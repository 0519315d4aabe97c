"""The errors a person may read. Each message says what is wrong and what to do next."""


class TaleloomError(Exception):
    """Base of every error whose message is written for the person using Taleloom."""


class InputError(TaleloomError, ValueError):
    """A prompt, setting or data file that cannot be used as it is."""


class ModelError(TaleloomError):
    """A storyteller folder or Hub repository that cannot be opened."""


class BusyError(TaleloomError):
    """More work was asked for than is allowed at once; waiting helps."""


class EngineError(TaleloomError):
    """Generation failed inside the engine; the story keeps the text it has."""
