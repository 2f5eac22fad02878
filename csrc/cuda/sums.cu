// Sums over spans in float64, in the order of the reference: lane l of 64 adds elements l, l + 64, ... of its span,
// then the lanes are added in halves. A lane is a thread; a block sums four spans at a time.
#include "disjoint.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int kSpansOfBlock = kSumThreads / static_cast<int>(kSumLanes);

// How one block's work is found: spans vary fastest, then what is summed of them.
struct Spans {
    int64_t num;  // elements
    int64_t span;
    int64_t num_spans;
    int64_t num_groups;  // of kSpansOfBlock spans
};

// Adds up `kTerms` sums of each lane, kept in shared memory as [kSpansOfBlock][kTerms][64].
template <int kTerms, class Block>
PM_DEVICE void add_lanes_together(const Block& block, double* lanes) {
    for (int width = static_cast<int>(kSumLanes) / 2; width > 0; width /= 2) {
        block.phase([&](int thread) {
            for (int i = thread; i < kSpansOfBlock * kTerms * width; i += kSumThreads) {
                double* own = lanes + (i / width) * static_cast<int>(kSumLanes);
                own[i % width] += own[i % width + width];
            }
        });
    }
}

// Terms is a struct with kTerms, num_items, prepare(tables, thread, num_threads, num), and add(tables, item, index,
// sums[kTerms]), which adds one element's terms; sum t of an item goes to place(tables, item, t) of a span's sums, or
// nowhere where that is negative.
template <class Terms>
struct span_sums_kernel {
    static constexpr int kThreads = kSumThreads;
    Arguments arguments;
    Spans spans;
    double* sums;  // [num_spans, num_sums]
    int64_t num_sums;
    Terms terms;

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        constexpr int kLanesOfSpan = static_cast<int>(kSumLanes);
        unsigned char* tables = block.template shared<unsigned char>();
        double* lanes = block.template shared<double>(arguments.num_bytes);
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) { terms.prepare(tables, thread, kThreads, spans.num); });
        for (int64_t work = block.index(); work < spans.num_groups * terms.num_items; work += block.num()) {
            const int64_t group = work % spans.num_groups;
            const int item = static_cast<int>(work / spans.num_groups);
            block.phase([&](int thread) {
                const int64_t span = group * kSpansOfBlock + thread / kLanesOfSpan;
                const int lane = thread % kLanesOfSpan;
                double own[Terms::kTerms];
                PM_UNROLL
                for (int term = 0; term < Terms::kTerms; ++term) own[term] = 0.0;
                if (span < spans.num_spans) {
                    const int64_t begin = span * spans.span;
                    const int64_t end = spans.num - begin < spans.span ? spans.num : begin + spans.span;
                    for (int64_t index = begin + lane; index < end; index += kLanesOfSpan) {
                        terms.add(tables, item, index, own);
                    }
                }
                PM_UNROLL
                for (int term = 0; term < Terms::kTerms; ++term) {
                    lanes[(thread / kLanesOfSpan * Terms::kTerms + term) * kLanesOfSpan + lane] = own[term];
                }
            });
            add_lanes_together<Terms::kTerms>(block, lanes);
            block.phase([&](int thread) {
                const int64_t span = group * kSpansOfBlock + thread / Terms::kTerms;
                const int term = thread % Terms::kTerms;
                if (thread >= kSpansOfBlock * Terms::kTerms || span >= spans.num_spans) return;
                const int64_t place = terms.place(tables, item, term);
                if (place >= 0) sums[span * num_sums + place] = finished_sum(lanes[thread * kLanesOfSpan]);
            });
        }
    }
};

PM_DEVICE float delta_one(const Source* sources, bool has_base, int64_t model, int64_t index) {
    const float x = read_one(sources[1 + model], index);
    return has_base ? Scalar::sub(x, read_one(sources[0], index)) : x;
}

// An item is a model: |delta|, |delta| kept, delta squared kept.
struct kept_terms : Keeping {
    static constexpr int kTerms = 3;
    Inputs inputs;
    int32_t num_items;

    PM_DEVICE void add(const unsigned char* tables, int item, int64_t index, double* sums) const {
        const Source* sources = reinterpret_cast<const Source*>(tables + inputs.sources);
        const float delta = delta_one(sources, inputs.has_base, item, index);
        const int32_t key = key_of<Scalar>(has_score ? read_one(score, index) : delta);
        const uint64_t seed = reinterpret_cast<const Keep*>(tables + keeps)[item].seed;
        const bool kept =
            is_kept<Scalar>(reinterpret_cast<const LocalKeep*>(tables + locals)[item], key, static_cast<int32_t>(index),
                            [&] { return static_cast<int32_t>(draw_of(seed, start + index)); });
        const double wide = absolute<Scalar>(delta);
        const double chosen = kept ? wide : 0.0;
        sums[0] += wide;
        sums[1] += chosen;
        sums[2] += chosen * chosen;
    }
    PM_DEVICE int64_t place(const unsigned char*, int item, int term) const { return 3 * item + term; }
};

// An item is a mask.
struct masked_terms {
    static constexpr int kTerms = 1;
    uint32_t masks;
    Source vector;
    int32_t num_items;

    PM_DEVICE void prepare(unsigned char*, int, int, int64_t) const {}
    PM_DEVICE void add(const unsigned char* tables, int item, int64_t index, double* sums) const {
        const uint64_t address = reinterpret_cast<const uint64_t*>(tables + masks)[item];
        const unsigned char* mask = reinterpret_cast<const unsigned char*>(address);
        const bool bit = mask[index / 8] >> (index % 8) & 1;
        sums[0] += bit ? static_cast<double>(absolute<Scalar>(read_one(vector, index))) : 0.0;
    }
    PM_DEVICE int64_t place(const unsigned char*, int item, int) const { return item; }
};

// Pairs i <= j of models by squares of four: an item is one square of the triangle, its terms the pairs in it.
constexpr int kSide = 4;

struct Squares {
    uint32_t corners;  // int32 [num_items, 2]: the first row and column of each
    int32_t num_models;

    // The place of pair (i, j) row by row in the triangle; -1 outside it.
    PM_DEVICE int64_t place_of(int64_t i, int64_t j) const {
        if (i > j || j >= num_models) return -1;
        return i * num_models - i * (i - 1) / 2 + (j - i);
    }
};

PM_DEVICE void load_sides(const Source* sources, bool has_base, const int32_t* corner, int32_t num_models,
                          int64_t index, double (&rows)[kSide], double (&columns)[kSide]) {
    const float base = has_base ? read_one(sources[0], index) : 0.0f;
    const auto value = [&](int model) -> double {
        if (model >= num_models) return 0.0;
        const float x = read_one(sources[1 + model], index);
        return has_base ? Scalar::sub(x, base) : x;
    };
    PM_ROLLED
    for (int side = 0; side < 2; ++side) {
        double found[kSide];
        PM_UNROLL
        for (int k = 0; k < kSide; ++k) found[k] = value(corner[side] + k);
        PM_UNROLL
        for (int k = 0; k < kSide; ++k) {
            if (side == 0) rows[k] = found[k];
            columns[k] = found[k];
        }
        if (corner[0] == corner[1]) return;
    }
}

struct gram_terms : Squares {
    static constexpr int kTerms = kSide * kSide;
    Inputs inputs;
    int32_t num_items;

    PM_DEVICE void prepare(unsigned char*, int, int, int64_t) const {}
    PM_DEVICE void add(const unsigned char* tables, int item, int64_t index, double* sums) const {
        const int32_t* corner = reinterpret_cast<const int32_t*>(tables + corners) + 2 * item;
        double rows[kSide];
        double columns[kSide];
        load_sides(reinterpret_cast<const Source*>(tables + inputs.sources), inputs.has_base, corner, num_models, index,
                   rows, columns);
        PM_UNROLL
        for (int term = 0; term < kTerms; ++term) sums[term] += rows[term / kSide] * columns[term % kSide];
    }
    PM_DEVICE int64_t place(const unsigned char* tables, int item, int term) const {
        const int32_t* corner = reinterpret_cast<const int32_t*>(tables + corners) + 2 * item;
        return place_of(corner[0] + term / kSide, corner[1] + term % kSide);
    }
};

// A thread is a column of one square of pairs; rows are added one after another.
struct gram_columns_kernel {
    static constexpr int kThreads = 256;
    Arguments arguments;
    Inputs inputs;
    Squares squares;
    int32_t num_items;
    int64_t num_rows;
    int64_t columns;
    double* sums;  // [num_pairs, columns]

    template <class Block>
    PM_DEVICE void operator()(const Block& block) const {
        unsigned char* tables = block.template shared<unsigned char>();
        arguments.bring(block, kThreads, tables);
        block.phase([&](int thread) {
            const Source* sources = reinterpret_cast<const Source*>(tables + inputs.sources);
            for (int64_t work = block.index() * kThreads + thread; work < columns * num_items;
                 work += block.num() * kThreads) {
                const int64_t column = work % columns;
                const int32_t* corner =
                    reinterpret_cast<const int32_t*>(tables + squares.corners) + 2 * (work / columns);
                double own[kSide * kSide];
                PM_UNROLL
                for (int term = 0; term < kSide * kSide; ++term) {
                    const int64_t place = squares.place_of(corner[0] + term / kSide, corner[1] + term % kSide);
                    own[term] = place < 0 ? 0.0 : sums[place * columns + column];
                }
                for (int64_t row = 0; row < num_rows; ++row) {
                    double left[kSide];
                    double right[kSide];
                    load_sides(sources, inputs.has_base, corner, inputs.num_models, row * columns + column, left,
                               right);
                    PM_UNROLL
                    for (int term = 0; term < kSide * kSide; ++term) {
                        own[term] += left[term / kSide] * right[term % kSide];
                    }
                }
                PM_UNROLL
                for (int term = 0; term < kSide * kSide; ++term) {
                    const int64_t place = squares.place_of(corner[0] + term / kSide, corner[1] + term % kSide);
                    if (place >= 0) sums[place * columns + column] = finished_sum(own[term]);
                }
            }
        });
    }
};

std::vector<int32_t> squares_of(size_t num_models) {
    std::vector<int32_t> corners;
    const int32_t num = static_cast<int32_t>(num_models);
    for (int32_t row = 0; row < num; row += kSide) {
        for (int32_t column = row; column < num; column += kSide) {
            corners.push_back(row);
            corners.push_back(column);
        }
    }
    return corners;
}

template <class Terms>
void run_sums(const char* op, int64_t num, int64_t span, int64_t num_sums, Tables* tables, Workspace* workspace,
              const Terms& terms, double* sums) {
    span_sums_kernel<Terms> kernel{};
    kernel.spans = {num, span, divided_up(num, span), 0};
    kernel.spans.num_groups = divided_up(kernel.spans.num_spans, kSpansOfBlock);
    if (num == 0) return;
    const size_t num_bytes = static_cast<size_t>(kernel.spans.num_spans * num_sums) * sizeof(double);
    tables->reserve(workspace);
    const size_t place = workspace->reserve(num_bytes);
    workspace->allocate();
    kernel.arguments = tables->finish(op, *workspace);
    kernel.sums = workspace->at<double>(place);
    kernel.num_sums = num_sums;
    kernel.terms = terms;
    const size_t shared_bytes = tables->num_bytes() + kSumThreads * Terms::kTerms * sizeof(double);
    const int64_t num_work = kernel.spans.num_groups * kernel.terms.num_items;
    const int64_t filling = 4 * filling_blocks(kSumThreads);
    launch(op, num, num_work < filling ? num_work : filling, shared_bytes, kernel);
    download(op, sums, kernel.sums, num_bytes);
}

}  // namespace

void kept_sums(const Disjoint& op, int64_t span, double* sums) {
    if (span > op.models.num) span = op.models.num;
    if (span > kPart) throw Failure("kept_sums: spans of more than 2**30 elements are not supported");
    if (span == 0) return;
    const int64_t num_sums = 3 * static_cast<int64_t>(op.models.views.size());
    for_parts(
        op,
        [&](const Disjoint& part, int64_t first) {
            Tables tables;
            Workspace workspace;
            kept_terms terms{};
            static_cast<Keeping&>(terms) = add_keeping(&tables, part);
            terms.inputs = add_inputs(&tables, part.models);
            terms.num_items = terms.inputs.num_models;
            run_sums("kept_sums", part.models.num, span, num_sums, &tables, &workspace, terms,
                     sums + first / span * num_sums);
        },
        kPart / span * span);
}

void gram_n(const Models& models, int64_t span, double* sums) {
    Tables tables;
    Workspace workspace;
    const size_t num_models = models.views.size();
    const std::vector<int32_t> corners = squares_of(num_models);
    gram_terms terms{};
    terms.inputs = add_inputs(&tables, models);
    terms.corners = tables.add(corners);
    terms.num_models = static_cast<int32_t>(num_models);
    terms.num_items = static_cast<int32_t>(corners.size() / 2);
    run_sums("gram_n", models.num, span, static_cast<int64_t>(num_models * (num_models + 1) / 2), &tables, &workspace,
             terms, sums);
}

void gram_columns(const Models& models, int64_t columns, double* sums) {
    const char* op = "gram_columns";
    if (models.num == 0) return;
    Tables tables;
    Workspace workspace;
    const size_t num_models = models.views.size();
    const std::vector<int32_t> corners = squares_of(num_models);
    gram_columns_kernel kernel{};
    kernel.inputs = add_inputs(&tables, models);
    kernel.squares.corners = tables.add(corners);
    kernel.squares.num_models = static_cast<int32_t>(num_models);
    kernel.num_items = static_cast<int32_t>(corners.size() / 2);
    kernel.columns = columns;
    kernel.num_rows = models.num / columns;
    const size_t num_bytes = num_models * (num_models + 1) / 2 * static_cast<size_t>(columns) * sizeof(double);
    tables.reserve(&workspace);
    const size_t place = workspace.reserve(num_bytes);
    workspace.allocate();
    kernel.arguments = tables.finish(op, workspace);
    kernel.sums = workspace.at<double>(place);
    upload(op, kernel.sums, sums, num_bytes);
    launch(op, models.num, blocks_for(columns * kernel.num_items, kernel.kThreads), tables.num_bytes(), kernel);
    download(op, sums, kernel.sums, num_bytes);
}

void masked_sums(const View& vector, const std::vector<uint64_t>& masks, int64_t span, double* sums) {
    Tables tables;
    Workspace workspace;
    masked_terms terms{};
    terms.masks = tables.add(masks);
    terms.vector = source_of(vector);
    terms.num_items = static_cast<int32_t>(masks.size());
    run_sums("masked_sums", vector.num, span, terms.num_items, &tables, &workspace, terms, sums);
}

}  // namespace cuda
}  // namespace pymerge
