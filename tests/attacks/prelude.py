"""What child processes of the tests have imported before they are forked; it must not run a model."""

import hypothesis  # noqa: F401
import neml2  # noqa: F401
import torch  # noqa: F401

import neml2_aoti_plugin.model  # noqa: F401
