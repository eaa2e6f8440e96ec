"""Steps by sign: w <- w - alpha * sign(gradient), and its relatives.

`scale_by_...` gives a direction, a bare algorithm name is an optimizer with a learning rate.
"""

from jaxclip.sign.caution import cautious as cautious
from jaxclip.sign.decay import cautious_decay as cautious_decay
from jaxclip.sign.directions import scale_by_lion as scale_by_lion
from jaxclip.sign.directions import scale_by_sign as scale_by_sign
from jaxclip.sign.directions import scale_by_signum as scale_by_signum
from jaxclip.sign.frank_wolfe import frank_wolfe as frank_wolfe
from jaxclip.sign.kinds import scaled_sign as scaled_sign
from jaxclip.sign.kinds import soft_sign as soft_sign
from jaxclip.sign.kinds import stochastic_sign as stochastic_sign
from jaxclip.sign.optimizers import lion as lion
from jaxclip.sign.optimizers import sign_sgd as sign_sgd
from jaxclip.sign.optimizers import signum as signum
from jaxclip.sign.voting import majority_vote as majority_vote
