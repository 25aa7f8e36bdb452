"""The colours of the heat maps: red, yellow, green, and readable without them."""

import numpy as np
import pytest

from moba_hf.evaluation.evaluation_figures import needle_figure
from moba_hf.evaluation.figures import DARK, HEAT

COLORS = HEAT(np.linspace(0, 1, 256))[:, :3]
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of linear red, green and blue
# what is left to who lacks a kind of cone: Machado, Oliveira and Fernandes (2009), severity 1, on linear colours
SEEN = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def linear(colors: np.ndarray) -> np.ndarray:
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def lightness(luminance: np.ndarray) -> np.ndarray:
    """CIE L*, 0 black … 100 white."""
    return np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27)


def test_red_yellow_green():
    red, yellow, green = HEAT([0.1, 0.7, 1.0])[:, :3]
    assert red[0] > 3 * red[1] and red[0] > 3 * red[2]
    assert yellow[0] > 0.8 and yellow[1] > 0.65 and yellow[2] < 0.3
    assert green[1] > green[0] + 0.2 and green[1] > green[2] + 0.2


@pytest.mark.parametrize("eye", SEEN)
def test_lightness_rises_all_the_way(eye):
    seen = lightness((linear(COLORS) @ SEEN[eye].T).clip(0, 1) @ LUMINANCE)
    assert (np.diff(seen) > 0.05).all(), "each of 256 steps is lighter than the one before"
    assert seen[-1] - seen[0] > 60, "and the ends are far apart"


def test_grey_copies_rise_too():
    assert (np.diff(COLORS @ [0.299, 0.587, 0.114]) > 0).all()  # how image programs and printers make grey


def test_writing_on_every_colour_is_readable():
    luminance = linear(COLORS) @ LUMINANCE
    white, black = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05
    contrast = np.where(np.linspace(0, 1, 256) < DARK, white, black)
    assert contrast.min() > 4.4


def test_needle_figures_use_it():
    figure = needle_figure({"full": [[1.0, 0.0]], "moba": [[0.3, None]]}, (1000, 2000), (0,))
    assert all(panel.images[0].cmap is HEAT for panel in figure.axes[:2])
    written = {text.get_text(): text.get_color() for panel in figure.axes[:2] for text in panel.texts}
    assert written == {"100": "black", "0": "white", "30": "white"}
