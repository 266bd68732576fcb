#include "microbatch/distributed/launch.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "microbatch/core/error.h"
#include "microbatch/distributed/gloo.h"
#include "microbatch/distributed/liveness.h"
#include "microbatch/memory/reclaim.h"

namespace microbatch {
namespace {

constexpr std::chrono::minutes longest_start{5};
constexpr const char* loopback = "127.0.0.1";
constexpr const char* by_launcher = "MICROBATCH_LAUNCHER";  // it serves the store

std::string text_in(const char* name) {
    const char* value = std::getenv(name);
    require_that(value != nullptr && *value != '\0', "WORLD_SIZE is set, and ", name,
                 " is not: start the processes with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT");
    return value;
}

int number_in(const char* name, int least, int most) {
    const std::string text = text_in(name);
    int number = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), number);
    require_that(failure == std::errc() && end == text.data() + text.size() && number >= least && number <= most, name,
                 " is \"", text, "\"; it must be a number from ", least, " to ", most);
    return number;
}

bool is_set(const char* name, std::string_view value) {
    const char* found = std::getenv(name);
    return found != nullptr && found == value;
}

// The address of this machine by which the host reaches it; empty if there is no way to it.
std::string address_towards(const std::string& host) {
    addrinfo how{}, *found = nullptr;
    how.ai_socktype = SOCK_DGRAM;
    if (::getaddrinfo(host.c_str(), "9", &how, &found) != 0) return {};
    std::string address;
    for (const addrinfo* one = found; one != nullptr && address.empty(); one = one->ai_next) {
        const int socket = ::socket(one->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        sockaddr_storage own{};
        socklen_t length = sizeof(own);
        char text[NI_MAXHOST];
        // Connecting a datagram socket sends nothing.
        if (socket >= 0 && ::connect(socket, one->ai_addr, one->ai_addrlen) == 0 &&
            ::getsockname(socket, reinterpret_cast<sockaddr*>(&own), &length) == 0 &&
            ::getnameinfo(reinterpret_cast<sockaddr*>(&own), length, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) ==
                0) {
            address = text;
        }
        if (socket >= 0) ::close(socket);
    }
    ::freeaddrinfo(found);
    // Where this machine's own name means the loopback, others do not reach it there.
    const bool is_loopback = host == "localhost" || host.starts_with("127.") || host == "::1";
    return address.starts_with("127.") && !is_loopback ? std::string() : address;
}

// The part of the store that is ours; after a restart by torchrun, a new one.
c10::intrusive_ptr<c10d::Store> prefixed(c10::intrusive_ptr<c10d::Store> store) {
    const char* restarts = std::getenv("TORCHELASTIC_RESTART_COUNT");
    return c10::make_intrusive<c10d::PrefixStore>(str_cat("microbatch/", restarts == nullptr ? "0" : restarts),
                                                  std::move(store));
}

}  // namespace

Launched Launched::from_environment() {
    if (std::getenv("WORLD_SIZE") == nullptr) return {};
    constexpr int most = 1 << 20;
    Launched launched;
    launched.size = number_in("WORLD_SIZE", 1, most);
    if (launched.size == 1) return {};
    launched.rank = number_in("RANK", 0, launched.size - 1);
    launched.local_size =
        std::getenv("LOCAL_WORLD_SIZE") != nullptr ? number_in("LOCAL_WORLD_SIZE", 1, launched.size) : 1;
    return launched;
}

std::shared_ptr<Group> Launched::join(Group::Options options) const {
    if (size == 1) {
        return std::make_shared<Group>(make_gloo(c10::make_intrusive<c10d::HashStore>(), 0, 1, loopback, longest_start),
                                       options);
    }
    const std::string host = text_in("MASTER_ADDR");
    const int port = number_in("MASTER_PORT", 1, 65535);
    const bool is_served = is_set("TORCHELASTIC_USE_AGENT_STORE", "True") || std::getenv(by_launcher) != nullptr;
    c10d::TCPStoreOptions how;
    how.port = static_cast<std::uint16_t>(port);
    how.isServer = !is_served && rank == 0;
    how.waitWorkers = false;
    how.timeout = longest_start;
    // Where the store is there, an address is right: who does not answer then has ended.
    ErrorKind kind = ErrorKind::usage;
    try {
        const auto store = prefixed(c10::make_intrusive<c10d::TCPStore>(host, how));
        kind = ErrorKind::lost_rank;
        return std::make_shared<Group>(make_gloo(store, rank, size, address_towards(host), options.timeout), options);
    } catch (const std::exception&) {
        const std::string why = message_of(std::current_exception());
        throw Error(kind, "rank ", rank, " of ", size, " does not reach the others at ", host, ":", port, ": ",
                    why.substr(0, why.find('\n')));
    }
}

struct Launcher::Server {
    c10::intrusive_ptr<c10d::TCPStore> store;
};

Launcher::Launcher() : server_(std::make_unique<Server>()) {
    c10d::TCPStoreOptions how;
    how.port = 0;  // any that is free
    how.isServer = true;
    how.waitWorkers = false;
    server_->store = c10::make_intrusive<c10d::TCPStore>(loopback, how);
}

Launcher::~Launcher() = default;

bool Launcher::has_joined(int rank) const {
    return prefixed(server_->store)->check({Liveness::key_of(rank)});
}

std::vector<std::string> Launcher::environment(int rank, int size) const {
    return {str_cat("RANK=", rank),
            str_cat("LOCAL_RANK=", rank),
            str_cat("WORLD_SIZE=", size),
            str_cat("LOCAL_WORLD_SIZE=", size),
            str_cat("MASTER_ADDR=", loopback),
            str_cat("MASTER_PORT=", server_->store->getPort()),
            str_cat(by_launcher, "=1")};
}

}  // namespace microbatch
