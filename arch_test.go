// Package vhostd_test holds the rules of the whole tree: who may import whom, where unsafe may be, and how files look.
package vhostd_test

import (
	"bytes"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/vhostd/vhostd"

// layers says what each package may import of this module, itself and what lies below it apart. A package that is not listed here
// has no place yet: decide on one.
var layers = map[string][]string{
	"virtio":             {},
	"internal/shm":       {},
	"internal/sys":       {},
	"internal/sys/uring": {},
	"internal/sys/xsk":   {"internal/shm"},
	"offload":            {"virtio"},
	"guestmem":           {"internal/shm"},
	"vring":              {"virtio", "guestmem", "internal/shm"},
	"zerocopy":           {"virtio", "guestmem", "vring", "offload", "internal/shm"},
	"netdev":             {"zerocopy", "offload", "virtio"},
	"internal/netopt":    {},
	"internal/config":    {},
	"internal/logsink":   {},
	"netdev/*":           {"netdev", "zerocopy", "offload", "virtio", "internal/netopt", "internal/sys", "internal/sys/uring", "internal/sys/xsk", "internal/shm"},
	"netdev/l2switch":    {"netdev", "netdev/soft", "zerocopy", "offload", "virtio", "internal/sys", "internal/shm"},
	"vhostuser":          {"internal/sys"},
	"backend":            {"vhostuser", "vring", "zerocopy", "netdev", "netdev/soft", "guestmem", "virtio", "offload", "internal/sys", "internal/shm"},
	"bench":              {"vhostuser", "vring", "guestmem", "virtio", "internal/sys", "internal/shm", "internal/placement"},
	"internal/placement": {},
	"cmd/*":              {"backend", "bench", "netdev", "netdev/*", "vhostuser", "virtio", "internal/*", "offload"},
	// What tests and people use may see everything.
	"internal/control":   {"internal/sys"},
	"internal/vhosttest": {"*"},
	"internal/require":   {},
	"internal/confine":   {},
	"internal/sysfault":  {},
	"netdev/netdevtest":  {"*"},
	"test/*":             {"*"},
}

const (
	maxFileLines     = 500
	maxFunctionLines = 60 // tests apart
)

// source is a parsed file.
type source struct {
	path string // slash-separated, relative to the module
	text []byte
	set  *token.FileSet
	ast  *ast.File
}

func (s source) test() bool { return strings.HasSuffix(s.path, "_test.go") }

func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go"):
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, path, text, parser.ParseComments)
		if err != nil {
			return err
		}
		all = append(all, source{filepath.ToSlash(path), text, set, f})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// rule finds the row of layers for a package.
func rule(pkg string) (allowed []string, ok bool) {
	if allowed, ok = layers[pkg]; ok {
		return allowed, true
	}
	for dir := pkg; dir != "." && dir != "/"; dir = filepath.Dir(dir) {
		if allowed, ok = layers[filepath.Dir(dir)+"/*"]; ok {
			return allowed, true
		}
	}
	return nil, false
}

// inside reports whether pattern, a package or "folder/*", covers pkg.
func inside(pattern, pkg string) bool {
	folder, ok := strings.CutSuffix(pattern, "*")
	return pattern == pkg || ok && strings.HasPrefix(pkg, folder)
}

func TestLayers(t *testing.T) {
	for _, s := range sources(t) {
		pkg := filepath.ToSlash(filepath.Dir(s.path))
		if s.test() || pkg == "." {
			continue // a test may use what it needs
		}
		allowed, ok := rule(pkg)
		if !ok {
			t.Errorf("package %s has no layer: list it in arch_test.go", pkg)
			continue
		}
		for _, imp := range s.ast.Imports {
			path, _ := strconv.Unquote(imp.Path.Value)
			dep, ours := strings.CutPrefix(path, module+"/")
			if !ours || dep == pkg || strings.HasPrefix(dep, pkg+"/") {
				continue
			}
			if !slices.ContainsFunc(allowed, func(a string) bool { return inside(a, dep) }) {
				t.Errorf("%s imports %s, which its layer does not allow", s.path, dep)
			}
		}
	}
}

func TestUnsafeOnlyWhereItSaysSo(t *testing.T) {
	for _, s := range sources(t) {
		if strings.HasSuffix(s.path, "_unsafe.go") || strings.HasSuffix(s.path, "_unsafe_test.go") {
			continue
		}
		for _, imp := range s.ast.Imports {
			if imp.Path.Value == `"unsafe"` {
				t.Errorf("%s imports unsafe: that belongs in a file named *_unsafe.go", s.path)
			}
		}
	}
}

func TestNoCgo(t *testing.T) {
	for _, s := range sources(t) {
		for _, imp := range s.ast.Imports {
			if imp.Path.Value == `"C"` {
				t.Errorf("%s imports C", s.path)
			}
		}
	}
}

func TestFormat(t *testing.T) {
	for _, s := range sources(t) {
		want, err := format.Source(s.text)
		if err != nil {
			t.Errorf("%s: %v", s.path, err)
		} else if !bytes.Equal(want, s.text) {
			t.Errorf("%s is not formatted: run gofmt -w", s.path)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, s := range sources(t) {
		if n := bytes.Count(s.text, []byte("\n")); n > maxFileLines && !s.test() {
			t.Errorf("%s has %d lines, at most %d: which second thing does it hold?", s.path, n, maxFileLines)
		}
		for _, d := range s.ast.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || s.test() {
				continue
			}
			if n := s.set.Position(f.End()).Line - s.set.Position(f.Pos()).Line + 1; n > maxFunctionLines {
				t.Errorf("%s: %s has %d lines, at most %d", s.path, f.Name.Name, n, maxFunctionLines)
			}
		}
	}
}

// said are methods whose interface says what they do: fmt's and errors', and netdev's.
var said = []string{
	"Error", "Unwrap", "Is", "String",
	"Capabilities", "SetOffloads", "SetPairs", "Queue", "Close",
	"Send", "Reap", "SendFD", "Recv", "RecvFD", "Counters", "Orphan", "Held", "Recall",
}

// Every package says what it is, and every exported name what it does.
func TestDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, s := range sources(t) {
		if s.test() {
			continue
		}
		pkg := filepath.Dir(s.path)
		documented[pkg] = documented[pkg] || s.ast.Doc != nil
		for _, d := range s.ast.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Name.IsExported() && f.Doc == nil && exportedReceiver(f) &&
				(f.Recv == nil || !slices.Contains(said, f.Name.Name)) {
				t.Errorf("%s: %s has no comment", s.path, f.Name.Name)
			}
		}
	}
	for pkg, ok := range documented {
		if !ok {
			t.Errorf("package %s has no package comment", pkg)
		}
	}
}

// exportedReceiver reports whether f is a function, or a method of an exported type.
func exportedReceiver(f *ast.FuncDecl) bool {
	if f.Recv == nil {
		return true
	}
	typ := f.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	id, ok := typ.(*ast.Ident)
	return !ok || id.IsExported()
}

func TestNothingLeftOpen(t *testing.T) {
	words := []string{"TO" + "DO", "FIX" + "ME", "XX" + "X"}
	for _, s := range sources(t) {
		for _, w := range words {
			if bytes.Contains(s.text, []byte(w)) {
				t.Errorf("%s contains %s", s.path, w)
			}
		}
	}
}
