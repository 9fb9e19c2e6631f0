package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"
)

// Validator is a body that knows what it must contain.
type Validator interface {
	Validate() error
}

// Encode writes v as the one form that this package produces.
func Encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	if len(b) > MaxBody {
		return nil, Errorf(CodeTooLarge, "a body of %d bytes is larger than %d", len(b), MaxBody)
	}
	return b, nil
}

// Decode reads one body from r into v and validates it. Errors are of type *Error
// with CodeTooLarge or CodeBadRequest, or the error of r.
func Decode(r io.Reader, v any) error {
	b, err := io.ReadAll(io.LimitReader(r, MaxBody+1))
	if err != nil {
		return fmt.Errorf("read body: %w", err)
	}
	return Unmarshal(b, v)
}

// Unmarshal is Decode for bytes.
func Unmarshal(b []byte, v any) error {
	if len(b) > MaxBody {
		return Errorf(CodeTooLarge, "the body is larger than %d bytes", MaxBody)
	}
	if !utf8.Valid(b) {
		return Errorf(CodeBadRequest, "the body is not UTF-8")
	}
	if err := inspect(b); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return Errorf(CodeBadRequest, "the body is not a %s: %s", nameOf(v), clip(strings.TrimPrefix(err.Error(), "json: ")))
	}
	if val, ok := v.(Validator); ok {
		return val.Validate()
	}
	return nil
}

// inspect refuses what encoding/json would let pass: a second value, names that
// occur twice (also when they differ in case only), deep nesting, long lists and texts.
func inspect(b []byte) error {
	type level struct {
		names map[string]bool // nil in a list
		key   bool            // a name comes next
		items int
	}
	var stack []level
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	for first := true; ; first = false {
		tok, err := d.Token()
		if err == io.EOF {
			if first || len(stack) > 0 {
				return Errorf(CodeBadRequest, "the body ends early")
			}
			return nil
		}
		if err != nil {
			return Errorf(CodeBadRequest, "the body is not JSON: %s", clip(err.Error()))
		}
		if len(stack) == 0 && !first {
			return Errorf(CodeBadRequest, "something follows the body")
		}
		if first && tok != json.Delim('{') {
			return Errorf(CodeBadRequest, "the body is not a JSON object")
		}
		if s, ok := tok.(string); ok && len(s) > MaxText {
			return Errorf(CodeBadRequest, "a text in the body is longer than %d bytes", MaxText)
		}
		if len(stack) > 0 && tok != json.Delim('}') && tok != json.Delim(']') {
			top := &stack[len(stack)-1]
			if top.names != nil && top.key {
				name := strings.ToLower(tok.(string))
				if top.names[name] {
					return Errorf(CodeBadRequest, "the body has %q twice", clip(name))
				}
				top.names[name] = true
				top.key = false
				continue
			}
			if top.items++; top.items > MaxItems {
				return Errorf(CodeBadRequest, "a list in the body has more than %d items", MaxItems)
			}
			top.key = true
		}
		switch tok {
		case json.Delim('{'):
			stack = append(stack, level{names: map[string]bool{}, key: true})
		case json.Delim('['):
			stack = append(stack, level{})
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:len(stack)-1]
		}
		if len(stack) > MaxDepth {
			return Errorf(CodeBadRequest, "the body is nested deeper than %d", MaxDepth)
		}
		if len(stack) == 0 && tok != json.Delim('}') {
			return Errorf(CodeBadRequest, "the body is not a JSON object")
		}
	}
}

func nameOf(v any) string {
	t := reflect.TypeOf(v)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.Name()
}
