"""Second moments of the inputs of each weight in a model: the data that its layers see.

    error of the outputs = E^T H E,  H = sum of x x^T over the inputs x

A model is any function of parameters and a batch: it is traced, and its weights are followed.
"""

from jaxclip.calibration.measuring import Calibration as Calibration
from jaxclip.calibration.measuring import InputMoments as InputMoments
from jaxclip.calibration.measuring import MatrixView as MatrixView
from jaxclip.calibration.measuring import measure as measure
from jaxclip.calibration.sensitivity import sensitivities as sensitivities
