// IDX files of images and labels, plain and gzipped.
#include "microbatch/data/idx.h"

#include <zlib.h>

#include <string>

#include "fuzz/fuzz.h"

namespace microbatch {
namespace {

using fuzz::require;

constexpr std::uint64_t most_bytes = 1 << 16;

std::optional<IdxArray> read(const std::filesystem::path& path, int dimensions) {
    const auto array = fuzz::accepted(ErrorKind::bad_data, [&] { return read_idx(path, dimensions, most_bytes); });
    if (!array) return array;
    std::uint64_t elements = 1;
    for (const std::int64_t length : array->shape) elements *= static_cast<std::uint64_t>(length);
    require(array->shape.size() == static_cast<std::size_t>(dimensions), "an array has the dimensions asked for");
    require(array->bytes.size() == elements, "the shape is filled");
    require(array->bytes.capacity() <= most_bytes, "the limit holds");
    return array;
}

std::string written(const IdxArray& array) {
    std::string bytes{0, 0, 8, static_cast<char>(array.shape.size())};
    for (const std::int64_t length : array.shape) {
        for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(length >> shift & 0xff);
    }
    return bytes.append(array.bytes.begin(), array.bytes.end());
}

std::string gzipped(std::string_view bytes) {
    z_stream stream{};
    constexpr int with_gzip_header = 16, small_window = 9, little_memory = 1;
    require(::deflateInit2(&stream, 1, Z_DEFLATED, with_gzip_header + small_window, little_memory,
                           Z_DEFAULT_STRATEGY) == Z_OK,
            "zlib has memory");
    std::string out(::deflateBound(&stream, bytes.size()), '\0');
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
    stream.avail_in = static_cast<uInt>(bytes.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    require(::deflate(&stream, Z_FINISH) == Z_STREAM_END, "what is compressed fits");
    out.resize(stream.total_out);
    ::deflateEnd(&stream);
    return out;
}

void expect_same(const std::optional<IdxArray>& one, const std::optional<IdxArray>& other, std::string_view what) {
    require(one.has_value() == other.has_value(), what);
    require(!one || (one->shape == other->shape && one->bytes == other->bytes), what);
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const std::string_view input = fuzz::characters(data, size);
    const auto path = fuzz::folder().write("input", input);
    for (const int dimensions : {1, 3}) {
        const auto array = read(path, dimensions);
        if (array) {
            expect_same(array, read(fuzz::folder().write("again", written(*array)), dimensions),
                        "what is written reads back");
        }
        // What is gzipped already would be unpacked once and not twice.
        if (!input.starts_with("\x1f\x8b")) {
            expect_same(array, read(fuzz::folder().write("zipped", gzipped(input)), dimensions),
                        "a file says the same when it is gzipped");
        }
    }
    return 0;
}
