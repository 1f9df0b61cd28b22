from tests.training.conftest import chat_model, corpus, model, store, tied_model  # noqa: F401
