//! Holding back what a machine says to others until the epoch that explains it is durable: whoever does that is told of each
//! moment. Nothing here knows a network.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};

use crate::error::{Error, Kind, Result};
use crate::platform::keys::{KEY_COMMAND_VARIABLE, KEY_VARIABLE};

/// Who holds back what a machine says.
pub trait Outputs: Send {
    /// The machine stands still: what it has said so far belongs to this moment, and what it says from now on to a later one. It goes
    /// on when this returns. If it fails there is no such moment.
    fn frozen(&mut self, moment: u64) -> Result<()>;

    /// The epoch of this moment is durable: what belongs to it may go out, and what belongs to those before it, of which some were
    /// never epochs.
    fn durable(&mut self, moment: u64) -> Result<()>;
}

/// How long the program may take to answer. The machine stands still meanwhile.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// A program that is told on its standard input, `frozen NUMBER` or `durable NUMBER` in a line, and answers each line with
/// `ok`.
pub struct OutputProgram {
    command: String,
    running: Option<Running>,
}

struct Running {
    process: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl OutputProgram {
    /// A command line for the shell. It is started when it is first told something, and again after it failed.
    pub fn new(command: &str) -> Self {
        Self { command: command.to_owned(), running: None }
    }

    fn start(&self) -> Result<Running> {
        let failed = |error| Error::io(format!("cannot start {:?}", self.command), error);
        let mut process = Command::new("sh")
            .args(["-c", &self.command])
            .env_remove(KEY_VARIABLE)
            .env_remove(KEY_COMMAND_VARIABLE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let none = || failed(std::io::Error::other("it has no pipes"));
        let input = process.stdin.take().ok_or_else(none)?;
        let output = process.stdout.take().ok_or_else(none)?;
        let (sender, answers) = unbounded();
        std::thread::Builder::new()
            .name("outputs".into())
            .spawn(move || {
                // It ends with the program, or when nobody listens any more.
                BufReader::new(output)
                    .lines()
                    .map_while(|line| line.ok())
                    .take_while(|line| sender.send(line.clone()).is_ok())
                    .count()
            })
            .map_err(failed)?;
        Ok(Running { process, input, answers })
    }

    fn tell(&mut self, what: &str, moment: u64) -> Result<()> {
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.start()?,
        };
        let failed = |why: String| {
            Error::new(Kind::Io, format!("{:?} was told {what:?}, {why}", self.command))
                .hint("it reads a line at a time, and answers each with the line `ok`")
        };
        if let Err(error) = running.input.write_all(format!("{what} {moment}\n").as_bytes()) {
            return Err(failed(format!("and is gone: {error}")));
        }
        match running.answers.recv_timeout(ANSWER_WAIT) {
            Ok(answer) if answer.trim() == "ok" => {
                self.running = Some(running);
                Ok(())
            }
            Ok(answer) => Err(failed(format!("and answered {answer:?}"))),
            Err(error) if error.is_timeout() => {
                Err(failed(format!("and did not answer within {} s", ANSWER_WAIT.as_secs())))
            }
            Err(_) => Err(failed("and ended".to_owned())),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that is at its end by itself needs no other.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Outputs for OutputProgram {
    fn frozen(&mut self, moment: u64) -> Result<()> {
        self.tell("frozen", moment)
    }

    fn durable(&mut self, moment: u64) -> Result<()> {
        self.tell("durable", moment)
    }
}
