"""A model folder that plain transformers loads (`python -m model.export RUN --out DIR --hub-layout`)."""
