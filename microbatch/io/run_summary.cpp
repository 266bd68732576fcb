#include "microbatch/io/run_summary.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/io/report_json.h"
#include "microbatch/io/write_whole.h"

namespace microbatch {
namespace {

constexpr const char* file_name = "summary.json";

}  // namespace

RunSummary RunSummary::with(const RunSummary& more) const {
    return {.banner = more.banner.empty() ? banner : more.banner,
            .held_out_loss = more.held_out_loss ? more.held_out_loss : held_out_loss,
            .tables = more.tables.empty() ? tables : more.tables,
            .curves = more.curves.empty() ? curves : more.curves};
}

RunSummary read_run_summary(const std::filesystem::path& folder) {
    std::ifstream stream(folder / file_name);
    if (!stream) return {};
    try {
        const auto json = nlohmann::json::parse(stream);
        RunSummary summary{.banner = json.at("banner"),
                           .tables = tables_from(json.at("tables")),
                           .curves = curves_from(json.at("curves"))};
        const auto& loss = json.at("held_out_loss");
        if (!loss.is_null()) summary.held_out_loss = loss.get<double>();
        return summary;
    } catch (const nlohmann::json::exception&) {
        throw Error(ErrorKind::bad_data, text((folder / file_name).string(), " is not as `train` writes it"));
    }
}

void write_run_summary(const std::filesystem::path& folder, const RunSummary& summary) {
    nlohmann::ordered_json json;
    json["banner"] = summary.banner;
    json["held_out_loss"] = summary.held_out_loss ? finite_or_null(*summary.held_out_loss) : nullptr;
    json["tables"] = to_json(summary.tables);
    json["curves"] = to_json(summary.curves);
    write_whole(folder / file_name, json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

}  // namespace microbatch
