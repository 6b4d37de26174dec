"""SASRec, the collaborative signal behind two tools and a baseline (Kang & McAuley, 2018).

A causal transformer over a user's item ids; position t predicts item t + 1.

Deviations from the original: 1. the loss is the full softmax over the catalogue (sampled above 20,000 items) instead of
one sampled negative a position, which ranks better; 2. pre-norm blocks; 3. sequences are cut to the last 32 items.
"""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from data import Dataset, reading

MAX_LEN = 32
MAX_SOFTMAX = 20_000  # more items than this and the loss samples that many
EPOCHS = 10, 20, 40  # of the baseline, tried in turn while the validation split gains
MAX_VALID = 5000  # validation samples for that


class Block(nn.Module):
    """Causal self-attention and a pointwise feed-forward layer, both residual."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] to the same shape; no position sees a later one."""
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each B, H, T, D, like y
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)), p)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), p)


class SASRec(nn.Module):
    """States of item sequences; ids are 1 to n_items, 0 pads at the end."""

    def __init__(self, n_items: int, dim=64, layers=2, heads=2, dropout=0.3):
        super().__init__()
        self.dropout = dropout
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(MAX_LEN, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        for e in (self.items, self.positions):
            nn.init.normal_(e.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] ids to [B, T, C] states; state t has seen items 0 to t only."""
        x = self.items(ids) * self.items.embedding_dim**0.5
        x = x + self.positions.weight[: ids.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @torch.no_grad()
    def states(self, sequences: list[np.ndarray]) -> torch.Tensor:
        """[n, C] state after the last item of each sequence of catalogue indices."""
        out = []
        for a in range(0, len(sequences), 512):
            part = sequences[a : a + 512]
            last = [min(len(s), MAX_LEN) - 1 for s in part]
            out.append(self(pad(part))[range(len(part)), last])
        return torch.cat(out)

    @torch.no_grad()
    def all_states(self, sequences: list[np.ndarray]) -> torch.Tensor:
        """[total length, C] states after every item of every sequence, sequence by sequence."""
        lengths = np.array([len(s) for s in sequences])
        starts = np.cumsum(lengths) - lengths
        out = torch.empty(int(lengths.sum()), self.items.embedding_dim)
        # similar lengths need little padding
        order = np.argsort(lengths, kind="stable")
        for a in range(0, len(order), 512):
            rows = order[a : a + 512]
            h = self(pad([sequences[i][:MAX_LEN] for i in rows]))
            steps = np.arange(h.shape[1])
            there = torch.from_numpy(steps < lengths[rows, None])
            out[torch.from_numpy(starts[rows, None] + steps)[there]] = h[there]
        late = [(i, j) for i in order for j in range(MAX_LEN, lengths[i])]
        for a in range(0, len(late), 8192):  # later items see a window of their own
            part = late[a : a + 8192]
            windows = [sequences[i][j + 1 - MAX_LEN : j + 1] for i, j in part]
            out[[int(starts[i]) + j for i, j in part]] = self.states(windows)
        return out

    @torch.no_grad()
    def scores(self, states: torch.Tensor, items=None) -> torch.Tensor:
        """[n, C] states to [n, items] scores of every item as the next one, or of [n, k] given ones."""
        if items is None:
            return states @ self.items.weight[1:].T
        return torch.einsum("nc,nkc->nk", states, self.items.weight[items + 1])


def pad(sequences: list[np.ndarray], limit: int = MAX_LEN) -> torch.Tensor:
    """The last `limit` items of each sequence as ids + 1, padded with 0 at the end: [n, T]."""
    T = max(1, min(limit, max(len(s) for s in sequences)))
    ids = np.zeros((len(sequences), T), np.int64)
    for i, s in enumerate(sequences):
        s = s[-T:]
        ids[i, : len(s)] = np.asarray(s) + 1
    return torch.from_numpy(ids)


def train_sasrec(ds: Dataset, end: int, seed=0, epochs=20, progress=None) -> SASRec:
    """Fit SASRec on interactions before time `end` (ms), by default as long as the tools' is; `progress` names a bar."""
    histories = [ds.before(user, end) for user in range(len(ds.users))]
    sequences = [ds.item[h[-MAX_LEN - 1 :]] for h in histories if len(h) > 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SASRec(len(ds.items))
        if not sequences:  # nobody has bought twice
            return model.eval()
        optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        steps = max(2, epochs * -(-len(sequences) // 128))
        schedule = OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in tqdm(range(epochs), progress, unit="epoch", disable=progress is None):
            for batch in torch.randperm(len(sequences)).split(128):
                ids = pad([sequences[i] for i in batch], MAX_LEN + 1)
                loss = next_item_loss(model, ids)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def fit_baseline(ds: Dataset, progress=None) -> SASRec:
    """SASRec fitted before `ds.train_end` for as many of EPOCHS as rank the validation split best."""
    best, found = None, -1.0
    for epochs in EPOCHS:
        title = progress and f"{progress}, {epochs} epochs"
        model = train_sasrec(ds, ds.train_end, epochs=epochs, progress=title)
        score = mean_ndcg(model, ds, ds.splits["valid"][:MAX_VALID])
        if score <= found:
            break
        best, found = model, score
    return best


def mean_ndcg(model: SASRec, ds: Dataset, samples) -> float:
    """Mean of 1/log2(1 + rank of the positive) over the samples, by whole histories."""
    states = model.states([ds.item[ds.before(s.user, s.time)] for s in samples])
    candidates = torch.tensor([s.candidates for s in samples])
    scores = model.scores(states, candidates)
    own = scores.gather(1, torch.tensor([[s.target] for s in samples]))
    return float((1 / torch.log2(1 + (scores >= own).sum(1))).mean())


def next_item_loss(model: SASRec, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next item of [B, T] ids, over the catalogue or a sample of it."""
    states, targets = model(ids[:, :-1]), ids[:, 1:]
    states, targets = states[targets > 0], targets[targets > 0]
    table = model.items.weight
    if len(table) - 1 <= MAX_SOFTMAX:
        return F.cross_entropy(states @ table[1:].T, targets - 1)
    # others' targets are no negatives: popular items would be that far more often
    drawn = torch.unique(torch.randint(1, len(table), (MAX_SOFTMAX,)))
    own = (states * table[targets]).sum(1, keepdim=True)
    others = states @ table[drawn].T
    others = others.masked_fill(drawn == targets[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([own, others], 1), torch.zeros_like(targets))


def load_sasrec(path, n_items: int) -> SASRec:
    """A model of the weights in a safetensors file; DatasetError if that is damaged."""
    model = SASRec(n_items)
    with reading(path):
        model.load_state_dict(load_file(path))
    return model.eval()
