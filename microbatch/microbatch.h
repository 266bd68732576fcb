#pragma once

/// Microbatch: train with the batch size you want in the memory you have. Start at step/accumulator.h.
///
/// This includes what a training loop of your own needs, and the models. Including the single headers compiles faster.

#include "microbatch/analysis/gradient_variance.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/autograd/recompute.h"
#include "microbatch/analysis/batch_size_sweep.h"
#include "microbatch/analysis/curvature.h"
#include "microbatch/core/batch_advice.h"
#include "microbatch/core/batch_plan.h"
#include "microbatch/core/error.h"
#include "microbatch/core/schedule.h"
#include "microbatch/core/units.h"
#include "microbatch/data/open.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/meter.h"
#include "microbatch/models/gpt.h"
#include "microbatch/models/mlp.h"
#include "microbatch/models/resnet.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/optim/torch_optimizer.h"
#include "microbatch/io/checkpoint_store.h"
#include "microbatch/run/run.h"
#include "microbatch/run/trainer.h"
#include "microbatch/step/accumulator.h"
#include "microbatch/step/probe.h"
