"""The synthetic weather set: streets with labels and depth, in two domains and five conditions."""

from alimm.projects.dcaa.synthetic.dataset import SyntheticWeatherDataset, export_dataset
from alimm.projects.dcaa.synthetic.paint import paint
from alimm.projects.dcaa.synthetic.scene import CLASSES, PALETTE, Scene, draw_scene
from alimm.projects.dcaa.synthetic.weather import CONDITIONS, apply_weather

__all__ = [
    "CLASSES",
    "CONDITIONS",
    "PALETTE",
    "Scene",
    "SyntheticWeatherDataset",
    "apply_weather",
    "draw_scene",
    "export_dataset",
    "paint",
]
