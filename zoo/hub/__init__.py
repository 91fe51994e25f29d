"""Checkpoints to the Hub and back.

    zoo.hub.push(model, "me/my-gla", tokenizer=tokenizer, license="apache-2.0")  # or a folder in place of the model
    zoo.hub.pull("me/my-gla", "my-gla")

What is pushed has a card, and loads with transformers' Auto classes after `import zoo`. `model.push_to_hub` is `push`.
"""

from zoo.hub.errors import HubError
from zoo.hub.pull import pull
from zoo.hub.push import Pushed, push

__all__ = ["HubError", "Pushed", "pull", "push"]
