#include "microbatch/io/event_file.h"

#include <unistd.h>

#include <bit>
#include <chrono>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

// The fields of tensorboard's event.proto and summary.proto, and protobuf's wire types.
enum Field : std::uint32_t { wall_time = 1, step_number = 2, file_version = 3, summary = 5, session_log = 7 };
enum SummaryField : std::uint32_t { summary_value = 1 };
enum SessionField : std::uint32_t { session_status = 1 };
enum SessionStatus : std::uint32_t { session_start = 1 };
enum ValueField : std::uint32_t { value_tag = 1, simple_value = 2 };
enum Wire : std::uint32_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

void add_varint(std::string& to, std::uint64_t number) {
    for (; number >= 0x80; number >>= 7U) to += static_cast<char>((number & 0x7FU) | 0x80U);
    to += static_cast<char>(number);
}

void add_key(std::string& to, std::uint32_t field, Wire wire) {
    add_varint(to, (field << 3U) | wire);
}

template <class Number>
void add_little_endian(std::string& to, Number number) {
    for (std::size_t i = 0; i < sizeof(Number); ++i) to += static_cast<char>((number >> (8 * i)) & 0xFFU);
}

void add_bytes(std::string& to, std::uint32_t field, std::string_view content) {
    add_key(to, field, bytes);
    add_varint(to, content.size());
    to += content;
}

std::string begin_event() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    std::string event;
    add_key(event, wall_time, fixed64);
    add_little_endian(event, std::bit_cast<std::uint64_t>(std::chrono::duration<double>(now).count()));
    return event;
}

// TensorFlow's masked checksum: one that is stored next to its data must not be valid for both.
std::uint32_t masked_crc(std::string_view data) {
    const std::uint32_t crc = crc32c(data);
    return ((crc >> 15U) | (crc << 17U)) + 0xA282EAD8U;
}

std::filesystem::path new_name(const std::filesystem::path& folder) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    char host[256] = "localhost";
    ::gethostname(host, sizeof(host) - 1);
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now).count();
    const auto name = [&](int more) {
        return folder /
               str_cat("events.out.tfevents.", seconds, ".", host, ".", ::getpid(), more > 0 ? str_cat(".", more) : "");
    };
    // A clock may jump back, and processes in containers may have the same number.
    int more = 0;
    while (std::filesystem::exists(std::filesystem::symlink_status(name(more)))) ++more;
    return name(more);
}

}  // namespace

EventFile::EventFile(const std::filesystem::path& folder) : file_(new_name(folder)) {
    std::string event = begin_event();
    add_bytes(event, file_version, "brain.Event:2");
    write_record(event);
}

std::string EventFile::go_on(std::int64_t steps) {
    std::string session;
    add_key(session, session_status, varint);
    add_varint(session, session_start);
    std::string event = begin_event();
    add_key(event, step_number, varint);
    add_varint(event, static_cast<std::uint64_t>(steps) + 1);
    add_bytes(event, session_log, session);
    return write_record(event);
}

std::string EventFile::write(std::int64_t step, std::span<const Scalar> scalars) {
    std::string values;
    for (const Scalar& scalar : scalars) {
        std::string value;
        add_bytes(value, value_tag, scalar.name);
        add_key(value, simple_value, fixed32);
        add_little_endian(value, std::bit_cast<std::uint32_t>(static_cast<float>(scalar.value)));
        add_bytes(values, summary_value, value);
    }
    std::string event = begin_event();
    add_key(event, step_number, varint);
    add_varint(event, static_cast<std::uint64_t>(step));
    add_bytes(event, summary, values);
    return write_record(event);
}

std::string EventFile::write_record(const std::string& data) {
    std::string record;
    add_little_endian(record, static_cast<std::uint64_t>(data.size()));
    add_little_endian(record, masked_crc(record));
    record += data;
    add_little_endian(record, masked_crc(data));
    return file_.append(record);
}

}  // namespace microbatch
