#include "microbatch/run/checkpoint_parts.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "microbatch/core/error.h"
#include "microbatch/memory/reclaim.h"
#include "microbatch/run/recovery.h"

namespace microbatch {
namespace {

using Json = nlohmann::json;

std::vector<std::string> gather_text(Reducer& reducer, const std::string& mine) {
    const at::Tensor bytes = at::empty({static_cast<std::int64_t>(mine.size())}, at::kByte);
    std::copy(mine.begin(), mine.end(), static_cast<char*>(bytes.mutable_data_ptr()));
    std::vector<std::string> all;
    for (const at::Tensor& one : reducer.gather(bytes)) {
        all.emplace_back(static_cast<const char*>(one.const_data_ptr()), one.nbytes());
    }
    return all;
}

std::string text_of(const std::vector<CheckpointFile>& files) {
    Json list = Json::array();
    for (const CheckpointFile& one : files) list.push_back({one.name, one.bytes, one.crc32c});
    return list.dump();
}

std::string text_of_failure(const std::string& why) {
    return Json(why.substr(0, why.find('\n'))).dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

// The parts are about as large as the first one's own.
std::int64_t PartsOfRanks::bytes_beside(const StateDict& state) const {
    return (reducer_.size() - 1) * own_part(state).bytes();
}

void PartsOfRanks::begin(const std::filesystem::path& folder) {
    gather_text(reducer_, folder.string());
}

std::vector<CheckpointFile> PartsOfRanks::finish() {
    std::vector<CheckpointFile> files;
    const std::vector<std::string> texts = gather_text(reducer_, {});
    for (std::size_t rank = 1; rank < texts.size(); ++rank) {
        const Json said = Json::parse(texts[rank]);
        if (said.is_string()) throw Error(ErrorKind::not_written, "rank ", rank, ": ", said.get<std::string>());
        for (const Json& one : said) files.push_back({one[0], one[1], one[2]});
    }
    return files;
}

void PartsOfRanks::end() {
    gather_text(reducer_, {});
}

void write_parts(Reducer& reducer, FileSystem& files, const std::function<StateDict()>& state) {
    while (true) {
        const std::string folder = gather_text(reducer, {}).front();
        if (folder.empty()) return;
        std::string said;
        try {
            said = text_of(write_checkpoint_part(files, folder, own_part(state()), reducer.rank()));
        } catch (const std::exception&) {
            said = text_of_failure(message_of(std::current_exception()));
        }
        gather_text(reducer, said);
    }
}

}  // namespace microbatch
