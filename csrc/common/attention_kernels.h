// What kernels of softmax attention are made of, for one instruction set.
#pragma once

#include "common/simd.h"

#include "common/convert.h"
#include "common/tiles.h"

#include "common/rows.h"

#include "common/pack.h"

#include "common/block.h"

#include "common/extras.h"

#include "common/few_queries.h"

#include "common/softmax_rows.h"

#include "common/partials.h"

#include "common/backward_block.h"
