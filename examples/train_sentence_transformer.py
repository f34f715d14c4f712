"""Fine-tune with SentenceTransformerTrainer and the drop-in loss, which stores no scores.

python examples/train_sentence_transformer.py [MODEL [STEPS]], MODEL a hub name or a folder.
Needs pip install 'sentence-transformers[train]'.
"""

import builtins
import sys
import tempfile

import sentence_transformers as st
from datasets import Dataset

import embedfuse
from embedfuse.integrations.sentence_transformers import losses

# A name of Python, and the first line of its documentation.
LINES = {name: x.__doc__.split("\n")[0] for name, x in vars(builtins).items() if x.__doc__}


def main(name: str = "sentence-transformers/all-MiniLM-L6-v2", steps: str = "20") -> tuple:
    model = st.SentenceTransformer(name)
    embedfuse.patch(model)
    pairs = Dataset.from_dict({"anchor": list(LINES), "positive": list(LINES.values())})
    before, loss = similarity(model), losses.MultipleNegativesRankingLoss(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": int(steps), "per_device_train_batch_size": 32, "report_to": "none"}
        args = st.SentenceTransformerTrainingArguments(folder, **settings)
        st.SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss).train()
    after = similarity(model)
    print(f"mean similarity of a name and its line: {before:.3f} before, {after:.3f} after")
    return before, after


def similarity(model: st.SentenceTransformer) -> float:
    sides = model.encode(list(LINES)), model.encode(list(LINES.values()))
    return model.similarity_pairwise(*sides).mean().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
