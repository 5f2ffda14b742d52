//! Requests with large bodies: the client that serves the others gives one up that has no answer after a while, and counts from
//! its beginning, though a slow way may take longer than that to carry it.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, ReqwestConnector,
};
use tokio::time::timeout;

use crate::platform::clock::Stopwatch;

/// What is longer than this is large. The answers to such take so long that another connection costs little.
const LARGE_LEN: usize = 2 << 20;

/// Bytes that the way is first thought to carry in a second, with several uploads beside one another.
const RATE: u32 = 1 << 20;

/// It may be so much slower, as is found out.
const LENIENCE_MAX: u32 = 8;

/// The longest time that an upload of a part may take, where the way is that slow.
pub const UPLOAD_WAIT_MAX: Duration = Duration::from_secs(LENIENCE_MAX as u64 * 18);

/// A client for large bodies.
#[derive(Debug)]
pub struct Uploads {
    client: HttpClient,
    /// How long an answer takes beside the body.
    answer_wait: Duration,
    rate: u32,
    /// How many times longer than it should an upload may take: doubled with each that took too long.
    lenience: AtomicU32,
}

impl Uploads {
    pub fn connect(options: &ClientOptions, answer_wait: Duration) -> object_store::Result<Self> {
        let options = options.clone().with_read_timeout(UPLOAD_WAIT_MAX * 2);
        let client = ReqwestConnector::default().connect(&options)?;
        Ok(Self { client, answer_wait, rate: RATE, lenience: AtomicU32::new(1) })
    }

    pub fn is_large(request: &HttpRequest) -> bool {
        request.body().content_length() > LARGE_LEN
    }

    pub async fn execute(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let len = u32::try_from(request.body().content_length()).unwrap_or(u32::MAX);
        let lenience = self.lenience.load(Relaxed);
        let wait = (self.answer_wait + Duration::from_secs(1) * len / self.rate) * lenience;
        let since = Stopwatch::start();
        let (answer, lenience) = match timeout(wait, self.client.execute(request)).await {
            Ok(answer) if since.elapsed() < wait / 4 => (answer, lenience / 2),
            Ok(answer) => (answer, lenience),
            Err(elapsed) => (Err(HttpError::new(HttpErrorKind::Timeout, elapsed)), lenience * 2),
        };
        self.lenience.store(lenience.clamp(1, LENIENCE_MAX), Relaxed);
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::super::use_ring;
    use super::*;

    /// A service that takes so long to read a body and to answer.
    fn serve(takes: Duration) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/part", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 20];
                    let mut left = LARGE_LEN + 1;
                    // The head is in the first that is read.
                    let mut len = stream.read(&mut buffer).unwrap_or(0);
                    let head =
                        buffer[..len].windows(4).position(|window| window == b"\r\n\r\n").map_or(len, |at| at + 4);
                    len -= head;
                    std::thread::sleep(takes);
                    while left > len {
                        left -= len;
                        len = stream.read(&mut buffer).unwrap_or(0);
                        if len == 0 {
                            return;
                        }
                    }
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
                });
            }
        });
        url
    }

    #[test]
    fn a_slow_way_is_given_more_time_until_it_carries_an_upload() {
        use_ring();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let wait = Duration::from_millis(400);
            let uploads = Uploads::connect(&ClientOptions::new().with_allow_http(true), wait).unwrap();
            let uploads = Uploads { rate: u32::MAX, ..uploads };
            let upload = |url: &str, len: usize| {
                let mut request = HttpRequest::new(vec![7; len].into());
                *request.method_mut() = "PUT".parse().unwrap();
                *request.uri_mut() = url.parse().unwrap();
                request
            };
            let (slow, quick) = (serve(Duration::from_millis(1000)), serve(Duration::ZERO));
            assert!(Uploads::is_large(&upload(&slow, LARGE_LEN + 1)) && !Uploads::is_large(&upload(&slow, LARGE_LEN)));
            for lenience in [2, 4] {
                let error = uploads.execute(upload(&slow, LARGE_LEN + 1)).await.unwrap_err();
                assert!(matches!(error.kind(), HttpErrorKind::Timeout), "{error}");
                assert_eq!(uploads.lenience.load(Relaxed), lenience);
            }
            assert!(uploads.execute(upload(&slow, LARGE_LEN + 1)).await.unwrap().status().is_success());
            assert_eq!(uploads.lenience.load(Relaxed), 4, "it took most of that time");
            for _ in 0..20 {
                assert!(uploads.execute(upload(&quick, LARGE_LEN + 1)).await.unwrap().status().is_success());
            }
            assert_eq!(uploads.lenience.load(Relaxed), 1);
        });
    }
}
