"""Write the model to take away: one file, a graph for ONNX Runtime, and a card."""

from ssnas.config.schema import Run
from ssnas.pipeline.artifacts import Places
from ssnas.pipeline.export import export
from ssnas.report.card import write_card
from stages.cli import main


def write_model(run: Run) -> None:
    """Write the files of artifacts/main/export."""
    export(run)
    places = Places.of(run)
    card = places.model.with_name("MODEL_CARD.md")
    write_card(places.metrics("rows", "evaluate.json").parent, card)


if __name__ == "__main__":
    main((), write_model)
