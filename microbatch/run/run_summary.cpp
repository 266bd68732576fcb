#include "microbatch/run/run_summary.h"

#include <nlohmann/json.hpp>
#include <stdexcept>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/bounded_json.h"
#include "microbatch/io/file_system.h"
#include "microbatch/io/input_file.h"
#include "microbatch/run/report_json.h"

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
    constexpr std::uint64_t most_bytes = std::uint64_t{64} << 20U;
    constexpr std::size_t most_values = 4'000'000;
    if (!std::filesystem::exists(folder / file_name)) return {};
    try {
        const auto json = parse_bounded(InputFile(folder / file_name).read_all(most_bytes), most_values);
        RunSummary summary{.banner = json.at("banner"),
                           .tables = tables_from(json.at("tables")),
                           .curves = curves_from(json.at("curves"))};
        const auto& loss = json.at("held_out_loss");
        if (!loss.is_null()) summary.held_out_loss = loss.get<double>();
        return summary;
    } catch (const nlohmann::json::exception&) {
        throw Error(ErrorKind::bad_data, str_cat((folder / file_name).string(), " was not written by `train`"));
    } catch (const std::invalid_argument& error) {
        throw Error(ErrorKind::bad_data, str_cat((folder / file_name).string(), ": ", error.what()));
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
