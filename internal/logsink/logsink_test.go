package logsink

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// tape is a writer that is slow, or fails, as the test says.
type tape struct {
	mu   sync.Mutex
	b    bytes.Buffer
	err  error
	part int           // bytes that are written all the same
	hold chan struct{} // Write waits for it, if not nil
}

func (w *tape) Write(p []byte) (int, error) {
	w.mu.Lock()
	hold := w.hold
	w.mu.Unlock()
	if hold != nil {
		<-hold
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		n := min(w.part, len(p))
		w.b.Write(p[:n])
		return n, w.err
	}
	return w.b.Write(p)
}

func (w *tape) set(err error, part int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err, w.part = err, part
}

func (w *tape) lines() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Split(strings.TrimSuffix(w.b.String(), "\n"), "\n")
}

// TestLinesInOrder: what is logged is written, in order, by the time that Flush returns.
func TestLinesInOrder(t *testing.T) {
	w := &tape{}
	log := New(w, false, slog.LevelInfo)
	log.Debug("not asked for")
	for i := range 50 {
		log.With("port", "p").Info("line", "i", i)
	}
	Flush(log)
	got := w.lines()
	if len(got) != 50 || !strings.HasSuffix(got[0], "msg=line port=p i=0") || !strings.HasSuffix(got[49], "i=49") {
		t.Errorf("%d lines: %q", len(got), got)
	}
}

// TestReaderThatDoesNotRead: whoever logs goes on while nothing can be written, memory stays bounded, Flush gives up, and what was lost is told later.
func TestReaderThatDoesNotRead(t *testing.T) {
	w := &tape{hold: make(chan struct{})}
	log := New(w, false, slog.LevelDebug)
	const lines = 3 * Capacity / 100
	for i := range lines {
		log.Debug(strings.Repeat("x", 100), "i", i)
	}
	s := log.Handler().(*handler).sink
	s.mu.Lock()
	held, lost := s.bytes, s.lost
	s.mu.Unlock()
	if held > Capacity || lost == 0 {
		t.Errorf("%d bytes are held, %d lines lost", held, lost)
	}
	Flush(log) // comes back
	close(w.hold)
	Flush(log)
	got := w.lines()
	last := got[len(got)-1]
	if !strings.Contains(last, "lines of the log were lost") || !strings.Contains(last, "lines=") {
		t.Errorf("the last line is %q", last)
	}
	if n := len(got) - 1; n+int(lost) != lines {
		t.Errorf("%d lines were written and %d lost, of %d", n, lost, lines)
	}
}

// TestFullDisk: lines that cannot be written are counted, one that was written in part does not spoil the next.
func TestFullDisk(t *testing.T) {
	w := &tape{}
	log := New(w, false, slog.LevelInfo)
	log.Info("one")
	Flush(log)
	w.set(errors.New("no space left on device"), 10)
	log.Info("two")
	Flush(log)
	w.set(errors.New("no space left on device"), 0)
	log.Info("three")
	Flush(log)
	w.set(nil, 0)
	log.Info("four")
	Flush(log)
	got := w.lines()
	if len(got) != 4 || !strings.Contains(got[0], "msg=one") || len(got[1]) != 10 || !strings.Contains(got[2], "msg=four") || !strings.Contains(got[3], "lines=2") {
		t.Errorf("%q", got)
	}
}

// TestFloodIsHeldBack: a message passes Burst times and then Rate times a second; others, and other loggers, do not notice.
func TestFloodIsHeldBack(t *testing.T) {
	w := &tape{}
	log := New(w, true, slog.LevelInfo)
	now := time.Unix(1_000_000, 0)
	log.Handler().(*handler).now = func() time.Time { return now }
	flooding, quiet := log.With("port", "bad"), log.With("port", "good")
	for range 10 * Burst {
		flooding.Warn("refused")
	}
	quiet.Warn("refused")
	flooding.Warn("another")
	now = now.Add(3 * time.Second)
	for range 10 {
		flooding.Warn("refused")
	}
	Flush(log)
	got := w.lines()
	if want := Burst + 2 + 3*Rate; len(got) != want {
		t.Fatalf("%d lines, want %d", len(got), want)
	}
	if last := got[Burst+2]; !strings.Contains(last, `"suppressed":900`) {
		t.Errorf("the first line after the flood is %s", last)
	}
	if s := strings.Join(got[Burst+3:], ""); strings.Contains(s, "suppressed") {
		t.Errorf("told twice: %s", s)
	}
}
