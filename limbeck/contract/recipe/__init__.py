"""The recipe: a frozen tree of choices, and the reader that reports every mistake at once.

Knows nothing of torch, onnx, or file locations (see `limbeck.contract.sources`). Every public name
of this package's modules can be imported from here.
"""

from limbeck.contract.recipe.base import *
from limbeck.contract.recipe.bench import *
from limbeck.contract.recipe.budget import *
from limbeck.contract.recipe.distillation import *
from limbeck.contract.recipe.encoder import *
from limbeck.contract.recipe.export import *
from limbeck.contract.recipe.inputs import *
from limbeck.contract.recipe.language import *
from limbeck.contract.recipe.reading import *
from limbeck.contract.recipe.root import *
from limbeck.contract.recipe.tasks import *
