//! The `epochfs` command.

fn main() -> std::process::ExitCode {
    epochfs::cli::main()
}
