package logsink

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"
)

// Sink is a queue of lines in front of a writer that may be slow, or fail.
type Sink struct {
	w      io.Writer
	format slog.Handler // over this Sink, for what it has to say itself
	wake   chan struct{}

	mu      sync.Mutex
	lines   [][]byte
	bytes   int    // of lines, and of what is being written
	lost    uint64 // lines
	waiting []chan struct{}
}

// Write implements io.Writer for a slog.Handler, which writes a line at a time. It never waits and never fails.
func (s *Sink) Write(line []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes+len(line) > Capacity {
		s.lost++
		return len(line), nil
	}
	s.lines = append(s.lines, append([]byte(nil), line...))
	s.bytes += len(line)
	s.signal()
	return len(line), nil
}

// signal wakes the goroutine.
func (s *Sink) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run writes lines.
func (s *Sink) run() {
	torn := false // the last line was written in part
	for range s.wake {
		for {
			lines := s.take()
			if len(lines) == 0 {
				break
			}
			for _, line := range lines {
				torn = s.put(line, torn)
			}
		}
	}
}

// take returns the lines that are to be written now; none means that all are written.
func (s *Sink) take() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	lines := s.lines
	if s.lines = nil; len(lines) == 0 {
		for _, c := range s.waiting {
			close(c)
		}
		s.waiting = nil
	}
	return lines
}

// put writes a line, on a new line if the last one is torn, and reports whether this one is.
func (s *Sink) put(line []byte, torn bool) bool {
	b := line
	if torn {
		b = append([]byte{'\n'}, line...)
	}
	n, err := s.w.Write(b)
	s.mu.Lock()
	s.bytes -= len(line)
	if err != nil {
		s.lost++
		s.mu.Unlock()
		return torn && n == 0 || n > 0
	}
	lost := s.lost
	s.lost = 0
	s.mu.Unlock()
	if lost > 0 {
		r := slog.NewRecord(time.Now(), slog.LevelWarn, "lines of the log were lost: it was written faster than it was taken, or could not be written", 0)
		r.AddAttrs(slog.Uint64("lines", lost))
		_ = s.format.Handle(context.Background(), r) // into this Sink, which never fails
	}
	return false
}

// flush waits until all lines are written, or for Patience.
func (s *Sink) flush() {
	done := make(chan struct{})
	s.mu.Lock()
	s.waiting = append(s.waiting, done)
	s.mu.Unlock()
	s.signal()
	select {
	case <-done:
	case <-time.After(Patience):
	}
}
