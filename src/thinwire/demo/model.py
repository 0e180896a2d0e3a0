"""The demo's model: a character-level language model, a two-layer LSTM."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class CharLM(nn.Module):
    """Predicts the next character; 3.5 million parameters at the default size."""

    def __init__(self, vocabulary: int, embedding: int = 128, hidden: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:  # [batch, length] -> [batch, length, vocabulary]
        return self.head(self.lstm(self.embedding(characters))[0])


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy, in nats a character, of windows ``[batch, length + 1]``."""
    logits: Tensor = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
