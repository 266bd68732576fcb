#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace microbatch::test {

/// The content of a file; empty if it cannot be read.
inline std::string read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

/// A file or folder below tests/, wherever the build folder is in the project.
inline std::filesystem::path test_file(const std::filesystem::path& name) {
    std::filesystem::path at = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    while (at.has_relative_path() && !std::filesystem::exists(at / "tests" / name)) at = at.parent_path();
    return at / "tests" / name;
}

/// A folder of the test's own below the system's one for temporary files, removed with all in it at the end.
class TempFolder {
public:
    TempFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "microbatch-test-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make the folder " + name);
        path_ = name;
    }
    TempFolder(const TempFolder&) = delete;
    TempFolder& operator=(const TempFolder&) = delete;
    ~TempFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    const std::filesystem::path& path() const { return path_; }

    /// Writes a file, and the folders it is in, and gives its path.
    std::filesystem::path write(const std::filesystem::path& name, std::string_view bytes) const {
        const std::filesystem::path file = path_ / name;
        std::filesystem::create_directories(file.parent_path());
        std::ofstream out(file, std::ios::binary);
        out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        out.close();
        if (!out) throw std::runtime_error("cannot write " + file.string());
        return file;
    }

    /// Calls a function while `path`, which is in this folder, is unreadable.
    template <class Call>
    void without_permission(const std::filesystem::path& path, Call&& call) const {
        std::filesystem::permissions(path_, std::filesystem::perms::all);
        std::filesystem::permissions(path, std::filesystem::perms::none);
        const uid_t user = ::geteuid();
        const uid_t nobody = 65534;
        // Root may read everything: become nobody meanwhile.
        if (user == 0 && ::seteuid(nobody) != 0) throw std::runtime_error("cannot become nobody");
        call();
        if (::seteuid(user) != 0) throw std::runtime_error("cannot become root again");
        std::filesystem::permissions(path, std::filesystem::perms::owner_all);
    }

private:
    std::filesystem::path path_;
};

}  // namespace microbatch::test
