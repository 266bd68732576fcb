#include "microbatch/data/listing.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"

namespace microbatch {
namespace {

constexpr std::size_t most_names = 3;

std::string size_of(const DataFile& file) {
    return str_cat(format_count(static_cast<std::int64_t>(file.bytes)), " bytes");
}

std::string total_of(const DataListing& listing) {
    return str_cat(format_count(listing.count), listing.count == 1 ? " file" : " files", " of ",
                   format_count(static_cast<std::int64_t>(listing.bytes)), " bytes");
}

const DataFile* find(const DataListing& listing, const std::string& name) {
    const auto found = std::find_if(listing.files.begin(), listing.files.end(),
                                    [&](const DataFile& file) { return file.name == name; });
    return found == listing.files.end() ? nullptr : &*found;
}

/// True if a file that is not listed is missing: it may also come after the last listed one.
bool lacks(const DataListing& listing, const std::string& name) {
    const bool complete = listing.count == static_cast<std::int64_t>(listing.files.size());
    return (complete || std::filesystem::path(name) < std::filesystem::path(listing.files.back().name)) &&
           find(listing, name) == nullptr;
}

std::vector<std::string> changes_between(const DataListing& before, const DataListing& now) {
    std::vector<std::string> changes;
    for (const DataFile& file : now.files) {
        const DataFile* old = find(before, file.name);
        if (old == nullptr) {
            if (lacks(before, file.name)) changes.push_back(str_cat(file.name, " (", size_of(file), ") is new"));
        } else if (old->bytes != file.bytes) {
            changes.push_back(str_cat(file.name, " had ", size_of(*old), " and has ", size_of(file)));
        } else if (old->checksum != file.checksum) {
            changes.push_back(str_cat(file.name, " still has ", size_of(file), ", but different content"));
        }
    }
    for (const DataFile& file : before.files) {
        if (lacks(now, file.name)) changes.push_back(str_cat(file.name, " (", size_of(file), ") is missing"));
    }
    return changes;
}

}  // namespace

void DataListing::add(DataFile file) {
    ++count;
    bytes += file.bytes;
    if (files.size() < most_files) files.push_back(std::move(file));
}

std::string describe_difference(const DataListing& before, const DataListing& now) {
    if (before == now || before.files.empty() || now.files.empty()) return {};
    std::string text;
    if (before.count != now.count) text = str_cat(total_of(before), " became ", total_of(now));
    const std::vector<std::string> changes = changes_between(before, now);
    if (!changes.empty()) {
        text += str_cat(text.empty() ? "" : ": ", list_names(changes));
    } else if (text.empty()) {
        text = str_cat("of the ", total_of(before), ", files after the first ", before.files.size(), " have changed");
    }
    return text;
}

std::string list_names(const std::vector<std::string>& names, std::int64_t count) {
    const std::size_t shown = std::min(names.size(), most_names);
    std::string text;
    for (std::size_t i = 0; i < shown; ++i) text += str_cat(i == 0 ? "" : ", ", names[i]);
    const std::int64_t more = count - static_cast<std::int64_t>(shown);
    return more > 0 ? str_cat(text, " and ", format_count(more), " more") : text;
}

std::string list_names(const std::vector<std::string>& names) {
    return list_names(names, static_cast<std::int64_t>(names.size()));
}

}  // namespace microbatch
